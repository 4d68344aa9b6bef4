"""Where every group is: the ledger, the replay buffer and evaluations, each a set of atomic Lua scripts."""
