"""The scripts of the Redis store: what happens to a user as one step on the server.

Every id has a stem; its keys are ``<stem>:<part>``. ``log``: hash of event id -> packed event. ``head``: hash with ``epoch`` (a token
that changes when the log changes in another way than by appending), ``count`` (events appended in all), ``kept`` (1 when a state was
stored) and one ``d:<digest>`` per stored state. ``recent``: the last events appended since then, as (event id, packed event) in turn.
``state:<digest>``: hash of epoch, count and packed state. ``about``: hash of attribute -> JSON. Of people with several ids one holds
all but ``log`` and ``about``: its head has ``members`` (msgpack: [[id, stem], ...]) and ``links``, the heads of the others have ``at``
(its stem) and ``person`` (its id).
"""

from __future__ import annotations

from maple.features.redis_link import Script

#: Events kept in ``recent``: a state that lacks more is folded from the log.
RECENT = 128

_HELP = """
local function home(stem)
  return redis.call('HGET', stem .. ':head', 'at') or stem
end
local function members(stem)
  local packed = redis.call('HGET', stem .. ':head', 'members')
  return packed and cmsgpack.unpack(packed) or nil
end
local function drop_states(stem)
  for _, field in ipairs(redis.call('HKEYS', stem .. ':head')) do
    if string.sub(field, 1, 2) == 'd:' then
      redis.call('DEL', stem .. ':state:' .. string.sub(field, 3))
      redis.call('HDEL', stem .. ':head', field)
    end
  end
  redis.call('DEL', stem .. ':recent')
  redis.call('HDEL', stem .. ':head', 'kept')
end
"""

#: stem, blocked set, hash, epoch if new, then (event id, packed event) in turn -> per event 1 = stored, 0 = duplicate; -1 = blocked
APPEND = Script(
    _HELP
    + f"""
local own, at = ARGV[1], home(ARGV[1])
if redis.call('SISMEMBER', ARGV[2], ARGV[3]) == 1 then return -1 end
local group = members(at)
local kept = redis.call('HEXISTS', at .. ':head', 'kept') == 1
local acks, new, clash = {{}}, 0, false
for i = 5, #ARGV, 2 do
  local stored = redis.call('HSETNX', own .. ':log', ARGV[i], ARGV[i + 1])
  acks[#acks + 1] = stored
  if stored == 1 then
    new = new + 1
    if kept then redis.call('RPUSH', at .. ':recent', ARGV[i], ARGV[i + 1]) end
    for _, member in ipairs(group or {{}}) do
      if member[2] ~= own and redis.call('HEXISTS', member[2] .. ':log', ARGV[i]) == 1 then clash = true end
    end
  end
end
if new > 0 then
  redis.call('HINCRBY', at .. ':head', 'count', new)
  if kept then redis.call('LTRIM', at .. ':recent', -{2 * RECENT}, -1) end
  if clash or redis.call('HEXISTS', at .. ':head', 'epoch') == 0 then redis.call('HSET', at .. ':head', 'epoch', ARGV[4]) end
end
return acks
"""
)

#: stem, digest -> at's person or false, epoch, count, members, state's count, state or false, pending, then [id or '', about] per member
FIND = Script(
    _HELP
    + """
local at = home(ARGV[1])
local head = redis.call('HMGET', at .. ':head', 'epoch', 'count', 'members')
local state = redis.call('HMGET', at .. ':state:' .. ARGV[2], 'epoch', 'count', 'blob')
local covered, blob, pending = 0, false, {}
if head[1] and state[1] == head[1] then
  local lacking = tonumber(head[2]) - tonumber(state[2])
  if lacking >= 0 and 2 * lacking <= redis.call('LLEN', at .. ':recent') then
    covered, blob = tonumber(state[2]), state[3]
    if lacking > 0 then pending = redis.call('LRANGE', at .. ':recent', -2 * lacking, -1) end
  end
end
local about = {}
for _, member in ipairs(head[3] and cmsgpack.unpack(head[3]) or {{'', ARGV[1]}}) do
  about[#about + 1] = {member[1], redis.call('HGETALL', member[2] .. ':about')}
end
local person = redis.call('HGET', ARGV[1] .. ':head', 'person')
return {person, head[1], tonumber(head[2] or 0), covered, blob, pending, about}
"""
)

#: stem -> epoch or false, count, [id or '', log] per member
LOGS = Script(
    _HELP
    + """
local at = home(ARGV[1])
local head = redis.call('HMGET', at .. ':head', 'epoch', 'count')
local logs = {}
for _, member in ipairs(members(at) or {{'', ARGV[1]}}) do
  logs[#logs + 1] = {member[1], redis.call('HGETALL', member[2] .. ':log')}
end
return {head[1], tonumber(head[2] or 0), logs}
"""
)

#: stem, digest, epoch, count, state, seconds it lives -> 1 = kept
KEEP = Script(
    f"""
local head, key = ARGV[1] .. ':head', ARGV[1] .. ':state:' .. ARGV[2]
local now = redis.call('HMGET', head, 'epoch', 'count')
if now[1] ~= ARGV[3] then return 0 end
local held = redis.call('HMGET', key, 'epoch', 'count')
if held[1] == ARGV[3] and tonumber(held[2]) > tonumber(ARGV[4]) then return 0 end
redis.call('HSET', key, 'epoch', ARGV[3], 'count', ARGV[4], 'blob', ARGV[5])
redis.call('EXPIRE', key, ARGV[6])
redis.call('HSET', head, 'kept', 1, 'd:' .. ARGV[2], '')
redis.call('LTRIM', ARGV[1] .. ':recent', -2 * math.max(tonumber(now[2]) - tonumber(ARGV[4]), {RECENT // 8}), -1)
return 1
"""
)

#: stem -> epoch or false, [[id, stem], ...] packed or false, links packed or false, id it goes by or false, its stem
PERSON = Script(
    _HELP
    + """
local at = home(ARGV[1])
local head = redis.call('HMGET', at .. ':head', 'epoch', 'members', 'links')
return {head[1], head[2], head[3], redis.call('HGET', ARGV[1] .. ':head', 'person'), at}
"""
)

#: msgpack of {expected: [[stem, epoch or ''], ...], ids: [[id, stem], ...], groups: [[person, stem, [[id, stem], ...], links], ...], epoch,
#: forget: bool, blocked: set's key, block: [hash, ...], refuse: [hash, ...]} -> how many events were forgotten; -1 = somebody was faster
REGROUP = Script(
    _HELP
    + """
local all = cmsgpack.unpack(ARGV[1])
for _, each in ipairs(all.expected) do
  local head = redis.call('HMGET', each[1] .. ':head', 'epoch', 'at')
  if (head[1] or '') ~= each[2] or head[2] then return -1 end
end
for _, hash in ipairs(all.refuse) do
  if redis.call('SISMEMBER', all.blocked, hash) == 1 then return -1 end
end
local gone = 0
for _, id in ipairs(all.ids) do
  local stem = id[2]
  drop_states(stem)
  redis.call('DEL', stem .. ':head')
  if all.forget then
    gone = gone + redis.call('HLEN', stem .. ':log')
    redis.call('DEL', stem .. ':log', stem .. ':about')
  end
end
for _, group in ipairs(all.groups) do
  local person, stem, ids, links = group[1], group[2], group[3], group[4]
  local count = 0
  for _, id in ipairs(ids) do
    count = count + redis.call('HLEN', id[2] .. ':log')
    if id[2] ~= stem then redis.call('HSET', id[2] .. ':head', 'at', stem, 'person', person) end
  end
  if #ids > 1 then
    redis.call('HSET', stem .. ':head', 'epoch', all.epoch, 'count', count, 'members', cmsgpack.pack(ids), 'links', cmsgpack.pack(links))
  elseif count > 0 then
    redis.call('HSET', stem .. ':head', 'epoch', all.epoch, 'count', count)
  end
end
for _, hash in ipairs(all.block) do redis.call('SADD', all.blocked, hash) end
return gone
"""
)

#: stem, epoch, event ids -> how many were dropped
DROP = Script(
    _HELP
    + """
local own, at = ARGV[1], home(ARGV[1])
local gone = 0
for i = 3, #ARGV do gone = gone + redis.call('HDEL', own .. ':log', ARGV[i]) end
if gone > 0 then
  drop_states(at)
  local count = redis.call('HINCRBY', at .. ':head', 'count', -gone)
  redis.call('HSET', at .. ':head', 'epoch', ARGV[2])
  if count == 0 and not members(at) then redis.call('DEL', at .. ':head') end
end
return gone
"""
)

#: stem, epoch, then (event id, packed event) in turn -> how many were there and are now these
AMEND = Script(
    _HELP
    + """
local own, at = ARGV[1], home(ARGV[1])
local changed = 0
for i = 3, #ARGV, 2 do
  if redis.call('HEXISTS', own .. ':log', ARGV[i]) == 1 then
    redis.call('HSET', own .. ':log', ARGV[i], ARGV[i + 1])
    changed = changed + 1
  end
end
if changed > 0 then
  drop_states(at)
  redis.call('HSET', at .. ':head', 'epoch', ARGV[2])
end
return changed
"""
)

#: stem, digest -> 1 = there was such a state
UNKEEP = Script(
    """
redis.call('HDEL', ARGV[1] .. ':head', 'd:' .. ARGV[2])
return redis.call('DEL', ARGV[1] .. ':state:' .. ARGV[2])
"""
)

#: stem, blocked set, hash, 1 = only what is not there yet, then (name, JSON or '') in turn -> -1 = blocked
DESCRIBE = Script(
    _HELP
    + """
if redis.call('SISMEMBER', ARGV[2], ARGV[3]) == 1 then return -1 end
local own = ARGV[1] .. ':about'
for i = 5, #ARGV, 2 do
  if ARGV[i + 1] ~= '' then
    redis.call(ARGV[4] == '1' and 'HSETNX' or 'HSET', own, ARGV[i], ARGV[i + 1])
  else
    redis.call('HDEL', own, ARGV[i])
    for _, member in ipairs(members(home(ARGV[1])) or {}) do redis.call('HDEL', member[2] .. ':about', ARGV[i]) end
  end
end
return 0
"""
)
