# The layers in the order in which they build on each other.
#
# A second application of the same overlay (two flakes that both bring it) changes nothing, so that
# `override`s made in between are not lost.
let
  layers = map import [
    ./cuda.nix
    ./python.nix
    ./kernels.nix
    ./vllm.nix
    ./appliance.nix
  ];
  compose =
    final: prev: builtins.foldl' (applied: layer: applied // layer final (prev // applied)) { } layers;
in
final: prev: if prev ? sparkPins then { } else compose final prev
