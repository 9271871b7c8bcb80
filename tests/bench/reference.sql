-- One event, one transaction: the writes of a receiver without the receiver.
\set event random(1, 1000000000)
\set envelope random(1, 1000000)
begin;
insert into events (dedup_key, type, envelope_id, body)
    values ('evt_' || :event, 'envelope.signed', 'env-' || :envelope, decode(repeat('ab', 704), 'hex'))
    on conflict do nothing;
insert into envelopes (id, status, fields_status, metadata)
    values ('env-' || :envelope, 'signed', 'ready', '{"external_id":"crm-1"}')
    on conflict (id) do update set status = excluded.status, updated_at = now();
insert into deliveries (event_id, callback)
    select id, 'slack' from events where dedup_key = 'evt_' || :event;
commit;
