"""Model servers of the run's own, for rewards that ask a model: vLLM's OpenAI server, started, watched, ended with it.

command     the command line and the environment of one server
supervisor  a process that is waited for, started again when it ends, and that ends with its owner
server      the two together, at a port of its own
local       servers without Ray, for what comes after a run
guard       inside the server: nobody without the run's key is answered
worker      the Ray shell, and all servers of a run as one
"""
