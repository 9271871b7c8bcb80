-- The least that a receiver has to keep: what was said, what is known of the
-- envelope, and who is still to be told. Played into an empty database.

create table events (
    id          bigint generated always as identity primary key,
    dedup_key   text not null unique,
    type        text not null,
    envelope_id text not null,
    occurred_at timestamptz,
    received_at timestamptz default now(),
    body        bytea not null
);
create index on events (envelope_id, id);

create table envelopes (
    id            text primary key,
    status        text not null,
    fields_status text,
    metadata      jsonb,
    updated_at    timestamptz default now(),
    last_event_at timestamptz
);
create index on envelopes (updated_at);

create table deliveries (
    id       bigint generated always as identity primary key,
    event_id bigint not null references events (id),
    callback text not null,
    state    text not null default 'pending',
    attempts int not null default 0,
    next_at  timestamptz default now()
);
create index on deliveries (next_at) where state = 'pending';
