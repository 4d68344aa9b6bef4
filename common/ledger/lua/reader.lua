-- Keep a policy version while a process fetches it. ARGV: "<version>|<reader>", ms it may still take (0 = done)
if ARGV[2] == '0' then return redis.call('ZREM', key('readers'), ARGV[1]) end
redis.call('ZADD', key('readers'), now_ms() + tonumber(ARGV[2]), ARGV[1])
return 1
