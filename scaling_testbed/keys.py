"""What a configuration key is to the identity of a run, as metadata of its field; config.run.run_id reads it.

A key without either is part of the run_id.
"""

# Says how a run is executed, not what it computes: left out, so that changing it finds the same run folder again.
EXECUTION_ONLY = {"identity": False}
# Of a field that came after the first runs: part of the run_id only where it is not at its default.
ADDED_LATER = {"identity": "if_set"}
