"""The front door: keys, admission, passthrough to the engine, health and the operator's API."""
