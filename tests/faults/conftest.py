"""The scorecard: each test marked `fault(name, promise)` is one line of `make faults`."""
