"""Reinforcement learning, asynchronous and disaggregated: rollout workers sample while the trainer trains (slime's mode for
agents, report, section 3.5).

    buffer.py     which attempts are made and which groups are trained on: the rules, without clock, threads or files
    exchange.py   these rules with a clock for leases and a journal that survives the trainer
    server.py     the exchange over HTTP, in the trainer's process
    worker.py     a process that samples with its own copy of the weights
    weights.py    one version of the weights as a file, with a checksum of every tensor
    trainer.py    the loop: what differs from the synchronous one
    virtual.py    the same with a virtual clock, in one process, repeatable to the bit
    timeline.py   who did what when
"""
