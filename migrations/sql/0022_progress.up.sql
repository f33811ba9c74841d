-- How far each handler is: its low-water mark, and what is open above it.
select;
