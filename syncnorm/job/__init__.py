"""The job that this process is a rank of: detect the launcher, join the other ranks, report failures, exit."""
