"""The paper's four questions in its six settings: what is missing, what it costs, what it says."""
