"""The built-in architectures, in the very shape a third party ships one."""
