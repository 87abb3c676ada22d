"""The job that this process is a rank of: who started it, where the ranks meet, how they join and leave."""
