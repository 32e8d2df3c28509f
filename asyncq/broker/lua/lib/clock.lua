-- The time is Redis's own, so that hosts with skewed clocks agree. It is kept in parts: a
-- double does not hold nanoseconds, and tostring would round milliseconds.
local time = redis.call('TIME')
local now_s = tonumber(time[1])
local now_us = now_s * 1000000 + time[2]
local now_ms = now_s * 1000 + math.floor(tonumber(time[2]) / 1000)
local now_ns = time[1] .. string.format('%06d', time[2]) .. '000'

local function integer(number)
  return string.format('%.0f', number)
end
