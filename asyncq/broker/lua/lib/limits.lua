-- What one answer carries of messages: more would take longer than a call may over a slow
-- link, and would then be asked for again and again.
local BATCH_BYTES = 8 * 1024 * 1024
