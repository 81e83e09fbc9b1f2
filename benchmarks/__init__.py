"""What durability costs, measured side by side with what there is otherwise; `make bench` runs it."""
