-- What another program made of a key is seen before anything is written: the error to answer
-- with, or nil when every key is of its kind or not there.
local function wrong_type(kinds)
  for key, kind in pairs(kinds) do
    local found = redis.call('TYPE', key).ok
    if found ~= kind and found ~= 'none' then
      return redis.error_reply('WRONGTYPE ' .. key .. ' is a ' .. found .. ', not a ' .. kind)
    end
  end
end
