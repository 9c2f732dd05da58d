"""Claims: one process at a time works in a directory, over several machines.

Locks of the kernel do not reach across machines on every network file system, so a
claim is made of files alone. `.claim/` holds numbered generations; the highest one is
the holder. The next one comes into being with `link`, which fails if it is there: of
all that judge a claim to be over, one succeeds it. Numbers of the recent past stay, so
that a slow contender cannot make one again.

A holder refreshes its file's time of change. It counts as dead if that was not done for
the length of its lease, by the file server's clock, so that the clocks of the machines
do not matter; or if one that waits has watched for so long and seen no refresh,
whatever time the file bears; or at once if it was a process of this machine and that
process is gone.
A holder that stood still for longer finds that it has been succeeded.
`SAMROBUST_CLAIM_LEASE` sets the seconds of the lease, 120 by default; with less than a
minute NFS may hide that a holder is alive.

`holder` reads who it is, `lease` takes and keeps a claim. Nothing here needs JAX.
"""

__all__ = []
