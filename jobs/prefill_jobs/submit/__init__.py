"""`submit`: runs jobs on a Ray cluster through its Jobs API. Start with `submission`.

`submit_request` builds the command line, `wheel` packs the code.
"""
