{ lib }:
let
  inherit (import ./address.nix { inherit lib; }) gateway isLoopback listen;
in
{
  isLoopback = {
    testIs = {
      expr = map isLoopback [
        "localhost"
        "127.0.0.1"
        "127.0.1.1"
        "::1"
      ];
      expected = [
        true
        true
        true
        true
      ];
    };
    testIsNot = {
      expr = map isLoopback [
        "0.0.0.0"
        "::"
        "10.0.0.1"
      ];
      expected = [
        false
        false
        false
      ];
    };
  };
  listen = {
    testAddress = {
      expr = listen "10.0.0.1" 8000;
      expected = "10.0.0.1:8000";
    };
    testBrackets = {
      expr = listen "::" 8000;
      expected = "[::]:8000";
    };
    testNoNames = {
      expr = listen "localhost" 8080;
      expected = "127.0.0.1:8080";
    };
  };
  gateway = {
    testOneAddress = {
      expr = gateway "10.0.0.1";
      expected = "10.0.0.1";
    };
    testEverywhere = {
      expr = map gateway [
        "0.0.0.0"
        "::"
        "::1"
      ];
      expected = [
        "localhost"
        "localhost"
        "localhost"
      ];
    };
  };
}
