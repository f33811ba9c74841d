-- Positions that are handed out in order, and the cure where they were not.
select;
