-- One command that stores a few bytes: the trainer's records must be written at maxmemory too, or it would never free memory.
-- ARGV: command, key, further arguments   Returns the command's reply.
return redis.call(ARGV[1], ARGV[2], unpack(ARGV, 3))
