"""What stands in the way of a run, on this machine or between several: checks that look, judge and say what to do."""
