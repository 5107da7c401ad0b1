"""A front in the way of OpenAI's API: a call comes in, the router chooses, the target's upstream answers.

`calls` and `events` are what goes over the wire, `upstream` is the way to one target, `proxy` leads a call there and
back. `ledger` keeps what outlives a call: conversations, money, and decisions until their feedback comes.
"""
