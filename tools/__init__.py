"""Development tools: private brokers, a faulty proxy, fuzzing, pictures for the documentation."""
