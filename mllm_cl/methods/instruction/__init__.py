"""Methods for instruction tuning: the tasks are questions and answers in text."""
