{ lib }: { types = { anything = null; }; }
