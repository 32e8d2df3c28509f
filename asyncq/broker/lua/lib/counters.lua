-- Statistics as Asynq keeps them: a total and one counter for each UTC day, kept 90 days.
local STATISTICS_S = 90 * 86400
local TOTAL_MAX = 9223372036854775807

-- The civil date of a unix time, in the proleptic Gregorian calendar with years that start in
-- March (Hinnant, "chrono-compatible low-level date algorithms").
local function utc_date(unix_s)
  local floor = math.floor
  local days = floor(unix_s / 86400) + 719468
  local era = floor(days / 146097)
  local of_era = days - era * 146097
  local year = floor(
    (of_era - floor(of_era / 1460) + floor(of_era / 36524) - floor(of_era / 146096)) / 365
  )
  local of_year = of_era - (365 * year + floor(year / 4) - floor(year / 100))
  local from_march = floor((5 * of_year + 2) / 153)
  local day = of_year - floor((153 * from_march + 2) / 5) + 1
  local month = from_march < 10 and from_march + 3 or from_march - 9
  year = year + era * 400 + (month <= 2 and 1 or 0)
  return string.format('%04d-%02d-%02d', year, month, day)
end

local function count_day(key, date, n)
  local daily = key .. ':' .. date
  if redis.call('INCRBY', daily, n) == n then
    redis.call('EXPIREAT', daily, now_s + STATISTICS_S)
  end
end

-- Adds attempts to both totals; like Asynq, the totals start again at 1 before they overflow,
-- both when `processed` is full.
local function count(processed, failed, processed_n, failed_n)
  if processed_n == 0 then
    return
  end
  local date = utc_date(now_s)
  count_day(processed, date, processed_n)
  local full = (tonumber(redis.call('GET', processed) or 0) or 0) + processed_n >= TOTAL_MAX
  if full then
    redis.call('SET', processed, processed_n)
  else
    redis.call('INCRBY', processed, processed_n)
  end
  if failed_n > 0 then
    count_day(failed, date, failed_n)
    if full then
      redis.call('SET', failed, failed_n)
    else
      redis.call('INCRBY', failed, failed_n)
    end
  end
end
