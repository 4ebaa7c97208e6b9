"""Measurements that take longer than tests, each one command."""
