import logging
from wsgiref.simple_server import make_server

from flask import Flask, jsonify

app = Flask(__name__)


@app.route("/")
def index():
    return jsonify(hello="world")


logging.basicConfig(level=logging.INFO)
with app.test_client() as client:
    assert client.get("/").get_json() == {"hello": "world"}
server = make_server("127.0.0.1", 0, app)
print("ready on port", server.server_port, flush=True)
server.serve_forever()
