"""Where tasks are done: each engine is a `concurrent.futures.Executor`, in a file of its own."""
