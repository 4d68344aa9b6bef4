-- One command that keeps a few bytes: the trainer's own record must go on at maxmemory, or it would never free what it trains.
-- ARGV: command, key name without the root, further arguments   Returns what the command does.
return redis.call(ARGV[1], key(ARGV[2]), unpack(ARGV, 3))
