"""Methods for class-incremental learning: the tasks are stages of new classes."""
