-- Deliveries whose event is gone.
select;
