-- Record that a process is alive, and its stats. Stamped here: the clocks of machines differ.
-- ARGV: process, stats (JSON), seconds after which a silent process is forgotten
redis.call('ZADD', key('processes'), now_ms(), ARGV[1])
redis.call('SET', key('process:' .. ARGV[1]), ARGV[2], 'EX', ARGV[3])
redis.call('ZREMRANGEBYSCORE', key('processes'), '-inf', now_ms() - 10000 * ARGV[3])
return 1
