{ lib }: args: { }
