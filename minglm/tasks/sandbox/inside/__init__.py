"""The processes of the sandbox, run as a program (`python minglm/tasks/sandbox/inside`) of the standard library alone.

    caller --- nursery          forks the others; holds nothing of the caller: no environment, no open files
                 +- guard       one a run: watches clock, processor time, memory, output; kills; tells the caller
                     +- first   the first process inside the walls: writes the files, starts the student, waits for it
                         +- student    the code that nobody trusts

The files here import one another by their bare names, because the package around them needs more than they may load.
"""
