"""The HTTP server: OpenAI's protocol on top of the engine, and a chat page.

protocol.py   what requests may hold, and errors in OpenAI's form
worker.py     the engine in a thread of its own, and answers that handlers can await
answers.py    the engine's outputs as OpenAI's response bodies and stream events
metrics.py    what Prometheus reads
app.py        the endpoints
page.html     the chat page, one file
"""
