"""What a project will need before it runs: disk, memory, hours and cost of every stage."""
