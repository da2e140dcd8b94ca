"""Which agent gets a request: functions of values, no clock, no I/O, no chance."""
