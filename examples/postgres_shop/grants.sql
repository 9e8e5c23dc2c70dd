-- For an installer that may not make roles. An application:
GRANT USAGE ON SCHEMA keyless TO shop;
GRANT EXECUTE ON FUNCTION keyless.submit, keyless.add_reader, keyless.remove_reader, keyless.next_outcome,
    keyless.put_off_outcome TO shop;

-- Workers:
GRANT USAGE ON SCHEMA keyless TO approvals;
GRANT SELECT ON keyless.migration TO approvals;
GRANT EXECUTE ON FUNCTION keyless.take, keyless.take_overdue, keyless.put_off, keyless.claim, keyless.unclaim,
    keyless.were_asked, keyless.decide, keyless.inspect, keyless.count_unread, keyless.list_unread, keyless.restore,
    keyless.serve, keyless.welcome_readers, keyless.clean TO approvals;
