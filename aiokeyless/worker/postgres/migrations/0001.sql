-- The tables, and the functions by which applications and workers use them.
--
-- A role that may execute a function needs no right on a table. Every function runs as the schema's owner, with a
-- search path that no caller can change, and names each table with its schema. Times are passed as seconds since 1970,
-- so no setting of a session and no codec of a driver changes their meaning.
--
-- Later migrations add functions, and change none, because workers of two versions use them at once.

-- After a failover that lost the last commits, or a restored backup, the ids of lost requests are given out again. A
-- delivery that was under way must not decide another request of its id. So each request also has a random name, which
-- workers and readers return with its id.
CREATE TABLE {schema}.request (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name bigint NOT NULL DEFAULT hashtextextended(gen_random_uuid()::text, 0),
    operation_id text COLLATE "C" NOT NULL UNIQUE,
    content_sha256 text NOT NULL,
    body text NOT NULL,
    traceparent text,
    requested_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL,
    stored_at timestamptz NOT NULL,
    asked integer,
    decided_at timestamptz
);
CREATE INDEX request_expires ON {schema}.request (expires_at) WHERE decided_at IS NULL;
COMMENT ON TABLE {schema}.request IS 'Requests for approvals; a row stays for 400 days, its body for a week after the decision.';
COMMENT ON COLUMN {schema}.request.asked IS 'Number of the delivery that was about to ask the user last; null: nobody was asked.';

-- The times of polls are not worth any WAL. After a crash the table is empty, and `restore` makes its rows again.
-- Each poll changes all of its columns but one, so its pages are kept half empty and vacuumed often.
CREATE UNLOGGED TABLE {schema}.waiting (
    id bigint PRIMARY KEY,
    name bigint NOT NULL,
    due_at timestamptz NOT NULL,
    deliveries integer NOT NULL,
    failures integer NOT NULL,
    answered boolean NOT NULL,
    version integer NOT NULL
) WITH (
    fillfactor = 50,
    autovacuum_vacuum_scale_factor = 0.05,
    autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_cost_delay = 0
);
CREATE INDEX waiting_due ON {schema}.waiting (due_at);
CREATE INDEX waiting_newer ON {schema}.waiting (due_at) WHERE version <> 1; -- than the first workers know
CREATE INDEX waiting_in_order ON {schema}.waiting
    (failures, (CASE WHEN answered THEN 0 WHEN deliveries > 0 THEN 1 ELSE 2 END), due_at);
COMMENT ON TABLE {schema}.waiting IS 'When the undecided requests are due.';
COMMENT ON COLUMN {schema}.waiting.answered IS 'Whether a poll was answered well.';
COMMENT ON COLUMN {schema}.waiting.version IS 'Version of the request: workers that do not know it leave it to others.';

CREATE TABLE {schema}.outcome (
    id bigint PRIMARY KEY,
    outcome text NOT NULL,
    body text NOT NULL,
    decided_at timestamptz NOT NULL
);
COMMENT ON TABLE {schema}.outcome IS 'Outcomes; a row stays for a week, or until each reader has handled it.';

CREATE TABLE {schema}.reader (
    name text COLLATE "C" PRIMARY KEY,
    owner name NOT NULL,
    ready boolean NOT NULL DEFAULT false
);
COMMENT ON COLUMN {schema}.reader.owner IS 'The login that may read under this name, or a role whose members may.';

CREATE TABLE {schema}.login (name name PRIMARY KEY);
COMMENT ON TABLE {schema}.login IS 'Logins that have added readers; a row is a lock, so that they count them one at a time.';

CREATE TABLE {schema}.unread (
    reader text COLLATE "C" NOT NULL,
    id bigint NOT NULL,
    due_at timestamptz NOT NULL,
    failures integer NOT NULL DEFAULT 0,
    PRIMARY KEY (reader, id)
);
CREATE INDEX unread_due ON {schema}.unread (reader, due_at);
COMMENT ON TABLE {schema}.unread IS 'Which reader has not handled which outcome.';

CREATE TABLE {schema}.service (
    is_only boolean PRIMARY KEY DEFAULT true CHECK (is_only),
    base_url text NOT NULL
);
COMMENT ON TABLE {schema}.service IS 'The service that all workers of the schema ask: that of the first one.';

-- Not an advisory lock: whoever may connect can take any of those, and hold up all outcomes.
CREATE TABLE {schema}.welcome ();
COMMENT ON TABLE {schema}.welcome IS 'Empty; a lock between outcomes that are stored and readers that are made ready.';


-- For applications that submit.

-- A text with a backslash begins with E, since an application may have set `standard_conforming_strings = off`.
CREATE FUNCTION {schema}.submit(request text, traceparent text DEFAULT NULL) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '3s' AS $function$
#variable_conflict use_variable
DECLARE
    fields jsonb;
    version text;
    is_known boolean; -- a later version has fields and values that only its workers know
    known constant text[] := '{version,user_id,operation_id,operation_payload,external_user_id,expires_in,created_at,context,require_auth_type,started_by}';
    bounds constant text := 'must have at most 400 characters, and be 0 or of a magnitude from 1e-307 to 1.8e308';
    kept_for constant interval := '400 days';
    moment constant timestamptz := clock_timestamp();
    created_at timestamptz := moment;
    wait interval := '120 s';
    seconds numeric := 120;
    content text;
    found_content text;
BEGIN
    IF octet_length(request) > 1048576 THEN
        RAISE 'the request must have at most 1048576 bytes, not %', octet_length(request)
            USING ERRCODE = 'invalid_parameter_value';
    ELSIF octet_length((request::json -> 'context')::text) > 65536 THEN
        RAISE 'context must have at most 65536 bytes of JSON' USING ERRCODE = 'invalid_parameter_value';
    -- Before the cast below: jsonb writes out each zero of 1e131000 and of 0e-16000. The text is JSON, so its strings end.
    ELSIF regexp_replace(request, E'"(?:[^"\\\\]|\\\\.)*"', '', 'g')
        ~ '([0-9.eE+-]{200}){2}[0-9.eE+-]|[eE][+-]?0*[1-9][0-9]{3}' THEN
        RAISE 'numbers %', bounds USING ERRCODE = 'invalid_parameter_value';
    END IF;
    fields := request;
    version := request::json -> 'version'; -- as it is written: to jsonb, 1e0 is 1
    is_known := version = '1';
    IF jsonb_typeof(fields) IS DISTINCT FROM 'object' THEN
        RAISE 'the request must be a JSON object' USING ERRCODE = 'invalid_parameter_value';
    ELSIF version IS NULL OR version !~ '^[1-9][0-9]*$' THEN
        RAISE 'version must be a whole number from 1 on' USING ERRCODE = 'invalid_parameter_value';
    ELSIF is_known AND fields - known <> '{}' THEN
        RAISE 'the request has unknown fields: %', (SELECT string_agg(key, ', ') FROM jsonb_object_keys(fields - known) key)
            USING ERRCODE = 'invalid_parameter_value';
    ELSIF is_known AND (jsonb_typeof(fields -> 'user_id') IS DISTINCT FROM 'string'
        OR fields ->> 'user_id' !~ '^[0-9A-Fa-f]+$' OR length(fields ->> 'user_id') > 512) THEN
        RAISE 'user_id must be a text of 1 to 512 hexadecimal digits' USING ERRCODE = 'invalid_parameter_value';
    ELSIF jsonb_typeof(fields -> 'operation_id') IS DISTINCT FROM 'string'
        OR length(fields ->> 'operation_id') NOT BETWEEN 1 AND 512 THEN
        RAISE 'operation_id must be a text of 1 to 512 characters' USING ERRCODE = 'invalid_parameter_value';
    ELSIF fields ->> 'operation_id' ~ E'[/\\\\]' AND fields ->> 'started_by' IS DISTINCT FROM 'phone' THEN
        RAISE 'operation_id must not contain a slash or a backslash: proxies decode or refuse these in a URL'
            USING ERRCODE = 'invalid_parameter_value';
    ELSIF jsonb_typeof(fields -> 'created_at') NOT IN ('string', 'null') OR is_known AND (
        jsonb_typeof(fields -> 'operation_payload') NOT IN ('string', 'null')
        OR jsonb_typeof(fields -> 'external_user_id') NOT IN ('string', 'null')
    ) THEN
        RAISE 'operation_payload, external_user_id and created_at must be texts' USING ERRCODE = 'invalid_parameter_value';
    ELSIF is_known AND fields -> 'require_auth_type' NOT IN ('"biom"', '"pin"', 'null') THEN
        RAISE 'require_auth_type must be biom, pin or null' USING ERRCODE = 'invalid_parameter_value';
    ELSIF is_known AND fields -> 'started_by' NOT IN ('"backend"', '"phone"') THEN
        RAISE 'started_by must be backend or phone' USING ERRCODE = 'invalid_parameter_value';
    ELSIF jsonb_path_exists(
        fields -> 'context', 'strict $.**{64 to last} ? (@.type() == "array" || @.type() == "object")'
    ) THEN
        RAISE 'context must be nested at most 64 deep' USING ERRCODE = 'invalid_parameter_value';
    ELSIF jsonb_typeof(fields -> 'expires_in') <> 'number' OR (fields -> 'expires_in')::numeric <= 0 THEN
        RAISE 'expires_in must be a positive number of seconds' USING ERRCODE = 'invalid_parameter_value';
    ELSIF jsonb_path_exists(
        fields, 'strict $.** ? (@ >= 1.8e308 || @ <= -1.8e308 || @ > -1e-307 && @ < 1e-307 && @ != 0)'
    ) THEN
        RAISE 'numbers %', bounds USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF fields ? 'expires_in' THEN
        seconds := trim_scale((fields -> 'expires_in')::numeric);
        wait := least(seconds, extract(epoch FROM kept_for)) * interval '1 s';
    END IF;
    IF fields ->> 'created_at' IS NOT NULL THEN
        IF fields ->> 'created_at'
            !~ E'^\\d{4}-\\d\\d-\\d\\d[Tt ]([01]\\d|2[0-3])(:[0-5]\\d){2}(\\.\\d+)?([Zz]|[+-]\\d\\d:\\d\\d)$' THEN
            RAISE 'created_at must be a time with a zone, such as 2027-01-31T12:00:00Z'
                USING ERRCODE = 'invalid_parameter_value';
        END IF;
        -- No request is made after it was stored. A clock that is ahead must not prolong a wait.
        created_at := least((fields ->> 'created_at')::timestamptz, moment);
    END IF;
    -- An absent text, an empty one and a default are the same. A context counts as it is, with the nulls in it.
    content := encode(sha256(convert_to((
        SELECT jsonb_object_agg(key, value)
        FROM jsonb_each(fields - 'version' - 'created_at'
            || jsonb_build_object('expires_in', seconds)
            || CASE WHEN is_known THEN jsonb_build_object('user_id', upper(fields ->> 'user_id')) ELSE '{}' END)
        WHERE value <> 'null' AND (value <> '""' OR key = 'context') AND (key, value) <> ('started_by', '"backend"')
    )::text, 'UTF8')), 'hex');

    WITH stored AS (
        INSERT INTO {schema}.request AS r
            (operation_id, content_sha256, body, traceparent, requested_at, expires_at, stored_at)
        VALUES (fields ->> 'operation_id', content, request, left(traceparent, 128), created_at, created_at + wait, moment)
        ON CONFLICT DO NOTHING
        RETURNING r.id, r.name
    )
    INSERT INTO {schema}.waiting (id, name, due_at, deliveries, failures, answered, version)
    SELECT stored.id, stored.name, moment, 0, 0, false, least(version::numeric, 2147483647) FROM stored;
    IF FOUND THEN
        RETURN false;
    END IF;
    SELECT r.content_sha256 INTO found_content FROM {schema}.request r WHERE r.operation_id = fields ->> 'operation_id';
    IF NOT FOUND THEN -- so it was the id that conflicted
        RAISE 'the next id is taken already, as after a logical replication; as the installer, run: SELECT setval(pg_get_serial_sequence(''{schema}.request'', ''id''), max(id)) FROM {schema}.request'
            USING ERRCODE = 'object_not_in_prerequisite_state';
    ELSIF found_content <> content THEN
        RAISE 'operation_id % belongs to a different request: choose a new one', to_json(fields ->> 'operation_id')
            USING ERRCODE = 'unique_violation';
    END IF;
    RETURN true;
EXCEPTION
    WHEN invalid_text_representation OR untranslatable_character THEN -- whose context quotes the request
        RAISE 'the request must be JSON of Unicode texts without NUL: %', SQLERRM USING ERRCODE = SQLSTATE;
    WHEN lock_not_available THEN
        RAISE 'this operation_id is in an open transaction, or a table is locked; transient: repeat the transaction'
            USING ERRCODE = SQLSTATE;
END
$function$;
COMMENT ON FUNCTION {schema}.submit IS 'Store a request for an approval, as JSON, unless the same is stored already; return whether it was.';


-- For applications that read.

CREATE FUNCTION {schema}.add_reader(reader text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '3s' AS $function$
#variable_conflict use_variable
BEGIN
    IF reader !~ '^[A-Za-z0-9_-]{1,128}$' THEN
        RAISE 'a reader''s name must be 1 to 128 letters, digits, "-" and "_"' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF NOT EXISTS (SELECT FROM {schema}.reader r WHERE r.name = reader) THEN
        -- An update, and no lock alone, so that REPEATABLE READ, which would not count the new ones, fails.
        INSERT INTO {schema}.login AS l VALUES (session_user) ON CONFLICT (name) DO UPDATE SET name = l.name;
        IF (SELECT count(*) FROM {schema}.reader r WHERE r.owner = session_user) >= 100 THEN
            RAISE 'this login has 100 readers already' -- each outcome is stored for each of them
                USING ERRCODE = 'program_limit_exceeded', HINT = 'SELECT {schema}.remove_reader(...) removes one.';
        END IF;
        INSERT INTO {schema}.reader (name, owner) VALUES (reader, session_user) ON CONFLICT DO NOTHING;
        -- An outcome that was being stored when an earlier reader of this name was removed.
        DELETE FROM {schema}.unread u WHERE u.reader = add_reader.reader;
    END IF;
    PERFORM {schema}.check_reader(reader);
EXCEPTION WHEN lock_not_available THEN
    RAISE 'a reader is added in an open transaction, or a table is locked; transient: repeat the transaction'
        USING ERRCODE = SQLSTATE;
END
$function$;
COMMENT ON FUNCTION {schema}.add_reader IS 'Let this login read outcomes under a name. A new name gets all that are stored.';

CREATE FUNCTION {schema}.remove_reader(reader text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
#variable_conflict use_variable
BEGIN
    PERFORM {schema}.check_reader(reader);
    DELETE FROM {schema}.reader r WHERE r.name = reader;
    DELETE FROM {schema}.unread u WHERE u.reader = remove_reader.reader;
END
$function$;
COMMENT ON FUNCTION {schema}.remove_reader IS 'Forget a reader of this login, and what it has not handled.';

-- A reader's name belongs to the login that added it.
CREATE FUNCTION {schema}.check_reader(reader text) RETURNS boolean
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
#variable_conflict use_variable
DECLARE
    known {schema}.reader;
BEGIN
    SELECT * INTO known FROM {schema}.reader r WHERE r.name = reader;
    IF NOT FOUND THEN
        RAISE 'there is no reader %', to_json(reader)
            USING ERRCODE = 'undefined_object', HINT = 'SELECT {schema}.add_reader(...) adds it.';
    ELSIF known.owner <> session_user AND NOT EXISTS (
        SELECT FROM pg_roles r WHERE r.rolname = known.owner AND pg_has_role(session_user, r.oid, 'MEMBER')
    ) THEN
        RAISE 'the reader % belongs to another login', to_json(reader) USING ERRCODE = 'insufficient_privilege';
    END IF;
    RETURN known.ready;
END
$function$;

CREATE FUNCTION {schema}.next_outcome(reader text, floor double precision DEFAULT NULL)
RETURNS TABLE (id bigint, name bigint, operation_id text, outcome text, event text, oldest double precision)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '15s'
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $function$
#variable_conflict use_column
DECLARE
    reading constant text := reader;
    moment constant timestamptz := clock_timestamp();
    lowest constant timestamptz := coalesce(to_timestamp(floor), '-infinity');
    candidates bigint[];
    first_due timestamptz;
    chosen bigint;
BEGIN
    IF NOT {schema}.check_reader(reading) THEN
        RETURN;
    END IF;
    SELECT array_agg(c.id), min(c.due_at) INTO candidates, first_due FROM (
        SELECT u.id, u.due_at FROM {schema}.unread u
        WHERE u.reader = reading AND u.due_at <= moment AND u.due_at >= lowest ORDER BY u.due_at LIMIT 100
    ) c;
    IF candidates IS NULL AND floor IS NULL THEN
        -- Nothing is put off for longer than this, so the clock was set back.
        candidates := ARRAY(
            SELECT u.id FROM {schema}.unread u WHERE u.reader = reading AND u.due_at > moment + interval '300 s' LIMIT 100
        );
    END IF;
    -- In a random order, so that an outcome that kills its process does not hold up the others.
    SELECT u.id INTO chosen FROM {schema}.unread u
    WHERE u.reader = reading AND u.id = ANY (candidates) ORDER BY random() LIMIT 1 FOR UPDATE SKIP LOCKED;
    IF chosen IS NULL THEN -- other processes have these hundred
        SELECT u.id INTO chosen FROM {schema}.unread u
        WHERE u.reader = reading AND u.due_at <= moment AND u.due_at >= lowest
        ORDER BY u.due_at LIMIT 1 FOR UPDATE SKIP LOCKED;
    END IF;
    DELETE FROM {schema}.unread u WHERE u.reader = reading AND u.id = chosen;
    RETURN QUERY
    SELECT o.id, r.name, r.operation_id, o.outcome, o.body, extract(epoch FROM first_due)::double precision
    FROM {schema}.outcome o JOIN {schema}.request r ON r.id = o.id WHERE o.id = chosen;
END
$function$;
COMMENT ON FUNCTION {schema}.next_outcome IS 'Take an outcome that this reader has not handled. It is handled when the transaction commits, and comes again if it does not.';

CREATE FUNCTION {schema}.put_off_outcome(reader text, outcome bigint, name bigint, delay double precision DEFAULT NULL)
RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
#variable_conflict use_variable
DECLARE
    most_failures constant integer := 15;
BEGIN
    PERFORM {schema}.check_reader(reader);
    UPDATE {schema}.unread u
    SET failures = least(u.failures + 1, most_failures),
        due_at = clock_timestamp() + least(coalesce(delay, power(2, u.failures)), 300) * interval '1 s'
    FROM (
        SELECT l.id FROM {schema}.unread l JOIN {schema}.request r ON r.id = l.id
        WHERE l.reader = put_off_outcome.reader AND l.id = outcome AND r.name = put_off_outcome.name
        FOR UPDATE OF l SKIP LOCKED -- another process has it now
    ) mine
    WHERE u.reader = put_off_outcome.reader AND u.id = mine.id;
END
$function$;
COMMENT ON FUNCTION {schema}.put_off_outcome IS 'Have an outcome that was not handled come again after so many seconds; by default 1, 2, 4, ... and at most 300.';


-- For workers. Times of polls need not survive a crash, so they do not wait for the disk. Claims and outcomes do.
--
-- A worker that got no answer for 10 s closes its connection, but the server's process would wait on for a lock: so
-- each wait has an end. So has a transaction whose worker lost its power or its network, and so cannot end it.

CREATE TYPE {schema}.delivery AS (
    id bigint,
    name bigint,
    body bytea,
    traceparent text,
    stored_at double precision,
    number integer,
    failures integer,
    due_at double precision
);

CREATE FUNCTION {schema}.take(
    up_to integer, lease double precision, floor double precision, untried integer, version integer
)
RETURNS SETOF {schema}.delivery
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '15s'
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $function$
DECLARE
    most_failures constant integer := 15;
    most_newer constant integer := 10;
    moment constant timestamptz := clock_timestamp(); -- in a variable, since WHERE would call it for each row
    lowest constant timestamptz := coalesce(to_timestamp(floor), '-infinity');
    newer constant bigint[] := ARRAY( -- a second later, so that workers that know the version take it before
        SELECT w.id FROM {schema}.waiting w
        WHERE w.due_at <= moment - interval '1 s' AND w.due_at >= lowest AND w.version > take.version AND w.version <> 1
        ORDER BY w.due_at LIMIT most_newer FOR UPDATE SKIP LOCKED
    );
    newest bigint[];
    chosen bigint[] := '{}';
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    IF untried IS NOT NULL THEN
        -- Of those that no poll answered, the newest first. Then many bad ones that came at once hold up no later one.
        newest := ARRAY(
            SELECT w.id FROM {schema}.waiting w
            WHERE w.failures = 0 AND CASE WHEN w.answered THEN 0 WHEN w.deliveries > 0 THEN 1 ELSE 2 END = 2
                AND w.due_at <= moment AND w.version <= take.version
            ORDER BY w.due_at DESC LIMIT up_to FOR UPDATE SKIP LOCKED
        );
        chosen := newest[:untried];
        FOR failed IN 0 .. most_failures LOOP
            EXIT WHEN cardinality(chosen) >= up_to;
            chosen := chosen || ARRAY(
                SELECT w.id FROM {schema}.waiting w
                WHERE w.failures = failed AND CASE WHEN w.answered THEN 0 WHEN w.deliveries > 0 THEN 1 ELSE 2 END = 0
                    AND w.due_at <= moment AND w.version <= take.version
                ORDER BY w.due_at LIMIT up_to - cardinality(chosen) FOR UPDATE SKIP LOCKED
            );
            chosen := chosen || ARRAY(
                SELECT w.id FROM {schema}.waiting w
                WHERE w.failures = failed AND CASE WHEN w.answered THEN 0 WHEN w.deliveries > 0 THEN 1 ELSE 2 END = 1
                    AND w.due_at <= moment AND w.version <= take.version
                ORDER BY w.due_at DESC LIMIT up_to - cardinality(chosen) FOR UPDATE SKIP LOCKED
            );
            IF failed = 0 THEN
                chosen := (chosen || newest[untried + 1:])[:up_to];
            END IF;
        END LOOP;
    ELSE
        chosen := ARRAY(
            SELECT w.id FROM {schema}.waiting w
            WHERE w.due_at <= moment AND w.due_at >= lowest AND w.version <= take.version
            ORDER BY w.due_at LIMIT up_to FOR UPDATE SKIP LOCKED
        );
    END IF;
    IF floor IS NULL THEN
        -- Nothing is put off or leased for longer than this, so the clock was set back.
        chosen := chosen || ARRAY(
            SELECT w.id FROM {schema}.waiting w WHERE w.due_at > moment + greatest(lease, 200) * interval '1 s'
            LIMIT up_to - cardinality(chosen) FOR UPDATE SKIP LOCKED
        );
    END IF;
    RETURN QUERY SELECT * FROM {schema}.deliver(newer || chosen, lease);
END
$function$;

CREATE FUNCTION {schema}.take_overdue(
    up_to integer, lease double precision, grace double precision, version integer
)
RETURNS SETOF {schema}.delivery
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '15s'
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
AS $function$
DECLARE
    moment constant timestamptz := clock_timestamp();
    over constant timestamptz := moment - grace * interval '1 s';
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    RETURN QUERY SELECT * FROM {schema}.deliver(ARRAY(
        SELECT w.id FROM {schema}.request r JOIN {schema}.waiting w ON w.id = r.id
        WHERE r.decided_at IS NULL AND r.expires_at <= over AND w.due_at <= moment AND w.version <= take_overdue.version
        ORDER BY r.expires_at LIMIT up_to FOR UPDATE OF w SKIP LOCKED
    ), lease);
END
$function$;

-- Make locked requests due again after the lease, and return them in the given order.
CREATE FUNCTION {schema}.deliver(chosen bigint[], lease double precision)
RETURNS SETOF {schema}.delivery
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off AS $function$
BEGIN
    PERFORM set_config('idle_in_transaction_session_timeout', '30s', true);
    RETURN QUERY
    WITH due AS (
        SELECT w.id, w.due_at FROM {schema}.waiting w WHERE w.id = ANY (chosen)
    ), delivered AS (
        UPDATE {schema}.waiting w
        SET deliveries = w.deliveries + 1, due_at = clock_timestamp() + lease * interval '1 s'
        WHERE w.id = ANY (chosen)
        RETURNING w.id, w.deliveries, w.failures
    )
    SELECT r.id, r.name, convert_to(r.body, 'UTF8'), r.traceparent, extract(epoch FROM r.stored_at)::double precision,
        delivered.deliveries, delivered.failures, extract(epoch FROM due.due_at)::double precision
    FROM delivered
    JOIN due ON due.id = delivered.id
    JOIN {schema}.request r ON r.id = delivered.id
    WHERE r.decided_at IS NULL
    ORDER BY array_position(chosen, r.id);
END
$function$;

-- The results are those of Python's `ExchangeResult`. Any other than these three resets the failures, and no more.
CREATE FUNCTION {schema}.put_off(
    ids bigint[], names bigint[], numbers integer[], delays double precision[], results integer[]
) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '15s'
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off AS $function$
DECLARE
    result_answered constant integer := 0;
    result_failed constant integer := 1;
    result_none constant integer := 2;
    most_failures constant integer := 15;
    moment constant timestamptz := clock_timestamp();
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true), set_config('idle_in_transaction_session_timeout', '30s', true);
    -- If another transaction has locked a request, it decides it, or has a later delivery of it.
    WITH mine AS (
        SELECT w.id, p.delay, p.result
        FROM unnest(ids, names, numbers, delays, results) p (id, name, number, delay, result)
        JOIN {schema}.waiting w ON w.id = p.id AND w.name = p.name AND w.deliveries = p.number
        FOR UPDATE OF w SKIP LOCKED
    )
    UPDATE {schema}.waiting w
    SET due_at = moment + least(mine.delay, 200) * interval '1 s',
        deliveries = w.deliveries - (mine.result = result_none)::integer,
        failures = CASE mine.result
            WHEN result_failed THEN least(w.failures + 1, most_failures) WHEN result_none THEN w.failures ELSE 0
        END,
        answered = w.answered OR mine.result = result_answered
    FROM mine WHERE w.id = mine.id;
END
$function$;

-- Lock several requests in the order of their ids, so that two transactions never wait for each other. Return the ids
-- in the given order, with null in place of those whose request has another name.
CREATE FUNCTION {schema}.lock_requests(ids bigint[], names bigint[]) RETURNS bigint[]
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off AS $function$
BEGIN
    PERFORM set_config('idle_in_transaction_session_timeout', '30s', true);
    IF current_setting('synchronous_commit') = 'off' THEN
        PERFORM set_config('synchronous_commit', 'on', true);
    END IF;
    PERFORM FROM {schema}.request r WHERE r.id = ANY (ids) ORDER BY r.id FOR NO KEY UPDATE;
    RETURN ARRAY(
        SELECT r.id FROM unnest(ids, names) WITH ORDINALITY n (id, name, place)
        LEFT JOIN {schema}.request r ON r.id = n.id AND r.name = n.name ORDER BY n.place
    );
END
$function$;

CREATE FUNCTION {schema}.claim(ids bigint[], names bigint[], numbers integer[])
RETURNS TABLE (id bigint, name bigint, was_asked boolean, moment double precision)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '15s'
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off AS $function$
#variable_conflict use_column
DECLARE
    locked constant bigint[] := {schema}.lock_requests(ids, names);
BEGIN
    RETURN QUERY SELECT r.id, r.name, r.asked IS NOT NULL, extract(epoch FROM clock_timestamp())::double precision
    FROM {schema}.request r WHERE r.id = ANY (locked) AND r.decided_at IS NULL;
    UPDATE {schema}.request r SET asked = c.number FROM unnest(locked, numbers) c (id, number)
    WHERE r.id = c.id AND r.decided_at IS NULL;
END
$function$;
COMMENT ON FUNCTION {schema}.claim IS 'Note that deliveries are about to ask users; return of each whether one was before, and the time. A decided request has no row.';

CREATE FUNCTION {schema}.unclaim(request bigint, name bigint, number integer) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '15s' AS $function$
DECLARE
    locked constant bigint[] := {schema}.lock_requests(ARRAY[request], ARRAY[name]);
BEGIN
    UPDATE {schema}.request r SET asked = NULL WHERE r.id = ANY (locked) AND r.asked = number;
    RETURN FOUND;
END
$function$;

CREATE FUNCTION {schema}.were_asked(ids bigint[], names bigint[]) RETURNS TABLE (id bigint, name bigint)
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '15s'
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off AS $function$
    SELECT r.id, r.name FROM unnest(ids, names) n (id, name)
    JOIN {schema}.request r ON r.id = n.id AND r.name = n.name WHERE r.asked IS NOT NULL
$function$;

CREATE FUNCTION {schema}.decide(ids bigint[], names bigint[], outcomes text[], bodies text[])
RETURNS TABLE (id bigint, name bigint)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '15s'
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off AS $function$
#variable_conflict use_column
DECLARE
    moment timestamptz;
    locked bigint[];
    decided bigint[];
BEGIN
    -- A reader that is added now is seen below, or waits for this transaction: see `welcome_readers`.
    LOCK TABLE {schema}.welcome IN ROW SHARE MODE;
    locked := {schema}.lock_requests(ids, names);
    moment := clock_timestamp();
    WITH changed AS (
        UPDATE {schema}.request r SET decided_at = moment WHERE r.id = ANY (locked) AND r.decided_at IS NULL RETURNING r.id
    )
    SELECT array_agg(changed.id) INTO decided FROM changed;
    DELETE FROM {schema}.waiting w
    WHERE w.id IN (SELECT l.id FROM {schema}.waiting l WHERE l.id = ANY (locked) ORDER BY l.id FOR UPDATE);
    INSERT INTO {schema}.outcome (id, outcome, body, decided_at)
    SELECT DISTINCT ON (d.id) d.id, d.outcome, d.body, moment
    FROM unnest(locked, outcomes, bodies) WITH ORDINALITY d (id, outcome, body, place)
    WHERE d.id = ANY (decided) ORDER BY d.id, d.place;
    INSERT INTO {schema}.unread (reader, id, due_at)
    SELECT r.name, d.id, moment FROM {schema}.reader r CROSS JOIN unnest(decided) d (id);
    RETURN QUERY SELECT r.id, r.name FROM {schema}.request r WHERE r.id = ANY (decided);
END
$function$;
COMMENT ON FUNCTION {schema}.decide IS 'Store outcomes and remove their requests from those that wait; return those that had no outcome yet.';

CREATE FUNCTION {schema}.inspect()
RETURNS TABLE (waiting bigint, backlog bigint, oldest_age double precision, is_standby boolean)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '15s' AS $function$
#variable_conflict use_column
BEGIN
    IF pg_is_in_recovery() THEN -- a standby has no unlogged table
        RETURN QUERY SELECT 0::bigint, 0::bigint, 0::double precision, true;
        RETURN;
    END IF;
    RETURN QUERY SELECT count(*), count(*) FILTER (WHERE w.deliveries = 0), coalesce((
        SELECT greatest(extract(epoch FROM clock_timestamp() - r.stored_at), 0)::double precision
        FROM {schema}.request r WHERE r.id = min(w.id)
    ), 0), false
    FROM {schema}.waiting w;
END
$function$;

-- A dead reader may have any number of unread outcomes, and workers ask every few seconds. So both functions look at
-- the first `most` of each reader, by the index: before a table is analyzed, the planner may prefer to sort all of it.
-- Ids are nearly in the order of the decisions.
CREATE FUNCTION {schema}.count_unread(most integer)
RETURNS TABLE (reader text, unread bigint, oldest_age double precision)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '15s'
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off SET enable_hashjoin = off
SET enable_mergejoin = off SET jit = off AS $function$
    SELECT r.name, count(o.id),
        coalesce(greatest(extract(epoch FROM clock_timestamp() - min(o.decided_at)), 0), 0)::double precision
    FROM {schema}.reader r
    LEFT JOIN LATERAL (
        SELECT u.id FROM {schema}.unread u WHERE u.reader = r.name ORDER BY u.id LIMIT most
    ) n ON true
    LEFT JOIN {schema}.outcome o ON o.id = n.id
    GROUP BY r.name
$function$;

CREATE FUNCTION {schema}.list_unread(most integer, up_to integer)
RETURNS TABLE (reader text, operation_id text, age double precision, failures integer)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '15s'
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off SET enable_hashjoin = off
SET enable_mergejoin = off SET jit = off AS $function$
    SELECT o.reader, q.operation_id,
        greatest(extract(epoch FROM clock_timestamp() - o.decided_at), 0)::double precision, o.failures
    FROM (
        SELECT n.reader, n.failures, d.id, d.decided_at
        FROM {schema}.reader r
        CROSS JOIN LATERAL (
            SELECT u.reader, u.id, u.failures FROM {schema}.unread u WHERE u.reader = r.name ORDER BY u.id LIMIT most
        ) n
        JOIN {schema}.outcome d ON d.id = n.id
        ORDER BY d.decided_at, d.id LIMIT up_to
    ) o
    JOIN {schema}.request q ON q.id = o.id
    ORDER BY o.decided_at, o.id
$function$;

-- After a crash, a failover or a restored backup, the table of waiting requests is empty. The numbers of deliveries go
-- on after the last one that may have asked the user.
CREATE FUNCTION {schema}.restore() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '15s'
SET enable_seqscan = off SET jit = off AS $function$
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    INSERT INTO {schema}.waiting (id, name, due_at, deliveries, failures, answered, version)
    SELECT r.id, r.name, clock_timestamp(), coalesce(r.asked, 0), 0, false,
        least((r.body::json ->> 'version')::numeric, 2147483647)
    FROM {schema}.request r
    WHERE r.decided_at IS NULL AND NOT EXISTS (SELECT FROM {schema}.waiting w WHERE w.id = r.id)
    FOR SHARE OF r SKIP LOCKED -- requests that are being decided
    ON CONFLICT DO NOTHING;
END
$function$;

-- Record the service of the first worker that names one, and return it.
CREATE FUNCTION {schema}.serve(service text) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '15s' AS $function$
BEGIN
    INSERT INTO {schema}.service (base_url) VALUES (service) ON CONFLICT DO NOTHING;
    RETURN (SELECT s.base_url FROM {schema}.service s);
END
$function$;

-- A new reader gets all stored outcomes. If `decide` stores one now, there are two cases: it sees the reader, and adds
-- the outcome itself; or it began before the reader was added, and this function waits for it. Likewise, `clean` keeps
-- what it would copy. While it waits, outcomes wait behind it, so it gives up soon, and the next turn tries again.
CREATE FUNCTION {schema}.welcome_readers() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '1s' AS $function$
DECLARE
    newcomer text;
BEGIN
    -- One at a time: the copies for a hundred could take longer than a turn may.
    SELECT r.name INTO newcomer FROM {schema}.reader r WHERE NOT r.ready LIMIT 1 FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    BEGIN
        LOCK TABLE {schema}.welcome IN EXCLUSIVE MODE;
        RAISE invalid_transaction_termination;
    EXCEPTION WHEN invalid_transaction_termination THEN -- which releases the lock: the copy may take long
    END;
    INSERT INTO {schema}.unread (reader, id, due_at)
    SELECT newcomer, o.id, clock_timestamp() FROM {schema}.outcome o
    ON CONFLICT DO NOTHING;
    UPDATE {schema}.reader r SET ready = true WHERE r.name = newcomer;
END
$function$;

-- Remove one page of old rows. Return where the next page begins, or null at the end.
CREATE FUNCTION {schema}.clean(after bigint) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '15s'
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off AS $function$
DECLARE
    page constant integer := 1000;
    body_until constant timestamptz := clock_timestamp() - interval '7 days';
    all_until constant timestamptz := clock_timestamp() - interval '400 days';
    last bigint;
    old bigint[];
    removed bigint;
BEGIN
    LOCK TABLE {schema}.welcome IN ROW SHARE MODE; -- as in `decide`
    IF EXISTS (SELECT FROM {schema}.reader r WHERE NOT r.ready) THEN
        RETURN NULL; -- outcomes are being copied
    END IF;
    SELECT max(p.id), coalesce(array_agg(p.id) FILTER (WHERE p.decided_at < body_until), '{}') INTO last, old
    FROM (SELECT o.id, o.decided_at FROM {schema}.outcome o WHERE o.id > after ORDER BY o.id LIMIT page) p;
    UPDATE {schema}.request r SET body = '' WHERE r.id = ANY (old) AND r.body <> '';
    DELETE FROM {schema}.outcome o WHERE o.id = ANY (old) AND (
        o.decided_at < all_until
        OR NOT EXISTS (
            SELECT FROM {schema}.reader d JOIN {schema}.unread u ON u.reader = d.name AND u.id = o.id
        )
    );
    DELETE FROM {schema}.unread u USING {schema}.reader d
    WHERE u.reader = d.name AND u.id = ANY (old)
        AND NOT EXISTS (SELECT FROM {schema}.outcome o WHERE o.id = u.id);
    DELETE FROM {schema}.request r
    WHERE r.id IN (SELECT o.id FROM {schema}.request o ORDER BY o.id LIMIT page) AND r.decided_at < all_until;
    GET DIAGNOSTICS removed = ROW_COUNT;
    RETURN CASE WHEN old <> '{}' THEN last WHEN removed > 0 THEN coalesce(last, after) END;
END
$function$;
