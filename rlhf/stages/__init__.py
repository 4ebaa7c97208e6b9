"""What happens in each kind of stage: one module, one function `run(context, name, stage)` each."""
