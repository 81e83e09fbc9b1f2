"""What is compared: each knows how to run the workloads that it can run."""
