-- Is an event in the outbox?
select;
