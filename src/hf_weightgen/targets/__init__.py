"""The networks whose weights are generated, and the tasks that they are made for."""
