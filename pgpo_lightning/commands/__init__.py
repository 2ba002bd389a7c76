"""The commands of `pgpo`. The only room that knows the command line."""
