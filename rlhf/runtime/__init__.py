"""What runs and ends the processes of a run."""
