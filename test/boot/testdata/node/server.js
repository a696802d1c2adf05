const express = require('express');
const { greet } = require('./lib/greet');

const app = express();
app.get('/', (req, res) => res.json({ hello: greet() }));
const server = app.listen(0, '127.0.0.1', () => console.log('ready on port', server.address().port));
