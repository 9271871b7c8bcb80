-- The same writes in one statement and one round trip: the hardest to keep up with.
\set event random(1, 1000000000)
\set envelope random(1, 1000000)
with event as (
    insert into events (dedup_key, type, envelope_id, body)
        values ('evt_' || :event, 'envelope.signed', 'env-' || :envelope, decode(repeat('ab', 704), 'hex'))
        on conflict do nothing
        returning id
), envelope as (
    insert into envelopes (id, status, fields_status, metadata)
        select 'env-' || :envelope, 'signed', 'ready',
            '{"external_id":"crm-1","note":"...................................................................................................................................."}'
        from event
        on conflict (id) do update set status = excluded.status, updated_at = now()
)
insert into deliveries (event_id, callback) select id, 'slack' from event;
