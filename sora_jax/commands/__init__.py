"""The command line: one module a command, options and help made from the declarations below."""
