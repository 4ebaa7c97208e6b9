"""The tools of reward authors, `python -m rewards --help`: the very processes of a run, without the run."""
